"""What a run costs, estimated before it is run: lengths, memory, FLOPs and seconds."""
