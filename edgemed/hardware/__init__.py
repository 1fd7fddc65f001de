"""What the machine is and how it is doing: devices, sensors, temperatures, memory, drivers.
Everything here reads files or small system calls, so that it works on a device without torch.
"""
