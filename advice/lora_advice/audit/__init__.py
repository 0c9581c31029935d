"""What the configurations and finished adapters that people have would cost, without a run: `lorabench audit`."""
