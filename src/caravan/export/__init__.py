"""Model folders to folders that other libraries load: sentence-transformers, transformers, PEFT."""
