class History:
    def __init__(self, settings): self.rows=[]
    def add(self, row): self.rows.append(row)
def settings_of(config): return config
