"""Language models and audio encoders by id, folder or package, and smaller ones made from them."""
