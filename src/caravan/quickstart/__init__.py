"""The embedded collection: documentation of Python and of the installed packages."""
