"""Everything DeepSpeed and disk: model, engine, data, checkpoint, metrics."""
