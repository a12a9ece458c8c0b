"""memshare: LLM agents share memories, and the retriever that finds them keeps learning."""

__version__ = "0.1.0"
