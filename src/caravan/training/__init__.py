"""Batches to better weights: losses, LightningModules, callbacks, optimisation."""
