"""Finding a model and reading its checkpoint: names, downloads, configs, tensors, the dense part."""
