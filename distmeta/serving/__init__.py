"""Methods outside of training: exported as graphs."""
