"""Hub: folders of diffusers, JSON and safetensors, read as bundles and written from them. Never pickles."""
