"""Other programs that use rmcore's models, each in an environment of its own: `bash launch/peers.sh`."""
