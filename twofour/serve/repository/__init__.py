"""Where models lie: folders or URLs with a `config.yaml` and numbered versions."""
