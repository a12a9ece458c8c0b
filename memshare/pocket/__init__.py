"""The offline default: a small world of tasks and a from-scratch LM."""
