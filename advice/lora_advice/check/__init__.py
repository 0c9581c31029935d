"""What can be known of a finished adapter without training: from its files, and from what it computes."""
