"""Speech language models, data, recipes and the training loop built on kdkernels. Runs from the checkout."""
