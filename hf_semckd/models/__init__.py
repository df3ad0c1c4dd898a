"""Loading models, the inputs that they take, and what they return."""
