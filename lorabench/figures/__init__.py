"""One module per figure, a catalogue of them, and a shared style."""
