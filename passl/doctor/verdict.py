HEALTHY="healthy"
class Diagnosis:
    verdict=HEALTHY
    evidence=[]; advice=[]
    def text(self): return ""
def diagnose(h): return Diagnosis()
