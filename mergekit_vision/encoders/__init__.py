"""CLIP encoders: loading them, running them with other weights and routed experts, and their zero-shot heads."""
