/// Everything strait offers, in one import. A part can be imported alone: `import strait.ring;`.
export module strait;

export import strait.error;
export import strait.topology;
export import strait.ring;
export import strait.park;
