/// Everything strait offers, in one import. A part can be imported alone: `import strait.ring;`.
export module strait;

export import strait.error;
export import strait.topology;
export import strait.memory;
export import strait.ring;
export import strait.park;
export import strait.endpoint;
export import strait.task;
export import strait.hub;
export import strait.channel;
export import strait.door;
export import strait.select;
export import strait.runtime;
