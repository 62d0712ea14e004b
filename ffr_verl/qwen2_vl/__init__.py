"""What the recipes add to verl's Qwen2-VL, through verl's own `model.external_lib`."""
