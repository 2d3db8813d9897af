"""Every mistake in a config, found before anything heavy is imported."""
