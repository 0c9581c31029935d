"""What can be known of a model, an adapter, a merged model or a server without training anything: `lorabench check`."""
