"""Mining, examples, batching, loss and the training step: pure pieces."""
