"""Features of samples: their gradients and the projection of these, within a memory budget."""
