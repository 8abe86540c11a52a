"""Approximate."""
from __future__ import annotations
import numpy as np, time
from sparsespec._kernels import descent as kernels
from sparsespec._kernels._compile import parallel_region
def _order(features):
    size=len(features); order=np.arange(size,dtype=np.int32); keys=np.empty(size,np.float32)
    B=kernels.BLOCK; bounds=np.array([0,size])
    while True:
        kernels.split_nodes(features,order,bounds,keys)
        new=[0]; more=False
        for a,b in zip(bounds[:-1].tolist(),bounds[1:].tolist()):
            n=-(-(b-a)//B)
            if n>=2:
                h=(n+1)//2; new.append(a+h*B); more|=h>1
            new.append(b)
        bounds=np.array(new)
        if not more: return order
def quantise(X):
    C=X.shape[1]; Cp=-(-C//4)*4
    A=np.abs(X); S=np.zeros((len(X),4),np.float32)
    for c in range(C): S[:,c%4]+=A[:,c]
    m=S.max(1); lim=min(m.max(),4*np.median(m[m>0])); scale=np.float32(32000/(2*lim))
    out=np.zeros((len(X),Cp),np.int16); np.clip(np.rint(X*scale),-16000,16000,out=out[:,:C],casting="unsafe"); return out, np.float32(1/scale)
def approximate_neighbors(X,k,*,grid=None,seed=0,threads=None,K=None,R=1024,h=4096,around=256,limit=3072,rk=16,rounds=6,delta=.01,log=None,near=20):
    K=K or k+k//2+2; N=len(X); t=[time.perf_counter()]; names=[]
    def tick(n):
        names.append(n); t.append(time.perf_counter())
    with parallel_region(threads):
        order=_order(X); tick("order")
        rows,unit=quantise(X[order]); tick("quant")
        nb=-(-N//kernels.BLOCK)
        blocks=np.sort(np.random.default_rng(seed).choice(nb,min(nb,R//64),replace=False))
        if R:
            sl=np.full((len(blocks)*64,K),-1,np.int32); sv=np.zeros((len(blocks)*64,K),np.float32)
            kernels.search_all(rows,blocks,unit,sl,sv)
            cnt=np.bincount(sl[sl>=0],minlength=N); H=np.argsort(-cnt,kind="stable")[:h]; H=np.sort(H[cnt[H]>0]).astype(np.int32)
        else: H=np.zeros(1,np.int32)
        tick("hubs")
        L=np.full((N,K),-1,np.int32); L2=np.empty_like(L); V=np.zeros((N,K),np.float32)
        P=np.zeros(kernels.PARTS,np.int64); Ch=np.zeros(kernels.PARTS,np.int64)
        rev=np.full((N,rk),-1,np.int32)
        kernels.descend(rows,unit,H,around,10**9,near,L,rev,L2,V,P,Ch); L,L2=L2,L; tick("first")
        if log: log(order,L,V,P.sum()/N,0)
        for r in range(rounds):
            tick("log")
            rev[:]=-1; kernels.reverse_lists(L,near,rev,np.zeros(N,np.int32)); tick("rev")
            Ch[:]=0; p0=P.sum()
            kernels.descend(rows,unit,np.empty(0,np.int32),0,limit,near,L,rev,L2,V,P,Ch); L,L2=L2,L; tick("round")
            if log: log(order,L,V,(P.sum()-p0)/N,Ch.sum()/N/k)
            if Ch.sum()<delta*N*k: break
        tick("log")
        nbr=np.empty((N,k),np.int32); w=np.empty((N,k),np.float32); c=np.zeros(N,np.int32)
        kernels.finish(X,order,L,nbr,w,c); tick("finish")
    approximate_neighbors.times=[(n,round(b-a,3)) for n,a,b in zip(names,t[:-1],t[1:]) if n!="log"]
    return nbr,w,c
