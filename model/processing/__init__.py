"""From images and conversations to tensors: what must agree with the model's configuration."""
