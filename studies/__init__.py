"""Research on top of the suite: each study is a folder with its page, presets, claims, figures and scripts."""
