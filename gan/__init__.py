"""The networks, the images, the pruning and every number about them; no word of reinforcement learning."""
