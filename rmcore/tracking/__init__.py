"""What a run reports while it trains: console, metrics.jsonl, TensorBoard, run_status.json."""
