"""A frozen audio encoder, a connector and a frozen language model as one speech LM."""
