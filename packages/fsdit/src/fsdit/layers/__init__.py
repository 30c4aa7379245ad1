"""The parts of an FSDiT block, one file a part of the paper's §2.3.1."""
