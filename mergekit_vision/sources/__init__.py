"""Labeled image sources: Parquet files, the Hugging Face hub, image folders, data set classes."""
