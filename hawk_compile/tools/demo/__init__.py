"""A small vision-language model to see and measure pruning on, and the scenes and questions it was trained on."""
