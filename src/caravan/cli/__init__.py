"""The command line: compose the config, check it, run one job or a sweep."""
