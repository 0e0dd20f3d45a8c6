"""The coordinator: admits updates, aggregates them and publishes model versions."""
