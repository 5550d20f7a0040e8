"""Where requests come from: JSONL, text lines, Parquet and Hugging Face datasets, all behind one `RequestFile`."""
