"""Results for people, from the files of finished runs alone."""
