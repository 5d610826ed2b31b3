"""Entries of the table of architectures, made of the classes of the installed transformers.

The generator and types that the table lacks need them. They import torch.
"""
