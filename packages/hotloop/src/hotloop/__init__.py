"""Fine-tune Hugging Face models faster and in less memory, with gradients no worse than PyTorch's."""
