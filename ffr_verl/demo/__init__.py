"""The demonstration: a tiny Qwen2-VL and the commands that take it through both training stages."""
