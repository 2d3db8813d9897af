"""Model cards: what a folder's README.md tells people and the Hub."""
