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
def approximate_neighbors(X,k,*,grid=None,seed=0,threads=None,K=None,base=4096,step=4,around=64,limit=3072,rk=16,rounds=6,delta=.02,log=None,near=20,k2=32,cdelta=None):
    K=K or k+k//2+2; N=len(X); t=[time.perf_counter()]; names=[]; B=kernels.BLOCK
    def tick(n):
        names.append(n); t.append(time.perf_counter())
    with parallel_region(threads):
        order=_order(X); tick("order")
        allrows,unit=quantise(X[order]); tick("quant")
        strides=[1]
        while -(-N//strides[-1])>base: strides.append(strides[-1]*step)
        nothing=np.empty(0,np.int32)
        for s in strides[::-1]:
            rows=np.ascontiguousarray(allrows[::s]); n=len(rows)
            nb=-(-n//B)
            if s==strides[-1]:
                L=np.full((nb*B,K),-1,np.int32); V=np.zeros((nb*B,K),np.float32)
                kernels.search_all(rows,np.arange(nb),unit,L,V); L=L[:n]; V=V[:n]; tick("base"); continue
            L2=np.full((n,K),-1,np.int32); V2=np.zeros((n,K),np.float32)
            L2[::step]=np.where(L>=0,L*step,-1); V2[::step]=V; L,V=L2,V2
            P=np.zeros(kernels.PARTS,np.int64); Ch=np.zeros(kernels.PARTS,np.int64)
            links=np.full((n,k2+rk),n,np.int32); ends=np.empty(n,np.int32)
            seen=np.zeros((nb,2048),np.int64)
            for r in range(rounds):
                tick("log")
                kernels.join_lists(L,k2,links,ends); tick("rev")
                Ch[:]=0; p0=P.sum()
                kernels.descend(rows,unit,around if r==0 else 0,limit,near,links,seen,L,V,P,Ch); tick("round%d"%s)
                if log: print("  n",n,end=" "); log(order[::s],L,V,(P.sum()-p0)/n,Ch.sum()/n/k)
                if Ch.sum()<(delta if s==1 else cdelta or delta)*n*k: break
        tick("log")
        nbr=np.empty((N,k),np.int32); w=np.empty((N,k),np.float32); c=np.zeros(N,np.int32)
        kernels.finish(X,order,L,nbr,w,c); tick("finish")
    approximate_neighbors.times=[(n,round(b-a,3)) for n,a,b in zip(names,t[:-1],t[1:]) if n!="log"]
    return nbr,w,c
