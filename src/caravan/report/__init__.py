"""Tables, tests, plots and pages from the files of finished runs."""
