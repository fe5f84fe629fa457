"""What `./run check` looks at: modules that give findings, and the baseline they are held to"""
