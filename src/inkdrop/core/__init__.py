"""Tensors and mathematics: no nn.Module, no files, no printing."""
