"""Any audio LM of transformers as teacher or student."""
