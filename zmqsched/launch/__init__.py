"""What starts nodes somewhere: one file a launcher, all of them starting the same command, ``zmqsched node``."""
