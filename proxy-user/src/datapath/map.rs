//! Maps as descriptors that the keeper passes on: typed access by system call, and arrays as memory.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

use anyhow::{Context, Result, anyhow};
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuArray};
use memmap2::{MmapOptions, MmapRaw};

/// Any of our types as aya wants it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Value<T>(pub T);

// SAFETY: a type that is Pod for bytemuck has no padding, and any bytes are a value of it.
unsafe impl<T: bytemuck::Pod> aya::Pod for Value<T> {}

pub type Table<K, V> = HashMap<MapData, Value<K>, Value<V>>;
pub type List<V> = Array<MapData, Value<V>>;
/// The key is a prefix length and what it is a prefix of.
pub type Trie<V> = LpmTrie<MapData, [u8; 20], Value<V>>;
pub type Counters<V> = PerCpuArray<MapData, Value<V>>;

/// The maps of an instance, by name.
pub struct Maps(pub BTreeMap<String, OwnedFd>);

impl Maps {
    fn take(&mut self, name: &'static str) -> Result<Map> {
        let descriptor = self
            .0
            .remove(name)
            .ok_or_else(|| anyhow!("the map {name} is missing"))?;
        let data = MapData::from_fd(descriptor).with_context(|| format!("open the map {name}"))?;
        Map::from_map_data(data).with_context(|| format!("open the map {name}"))
    }

    /// How many entries a map has room for.
    pub fn entries(&self, name: &'static str) -> Result<u32> {
        let descriptor = self
            .0
            .get(name)
            .ok_or_else(|| anyhow!("the map {name} is missing"))?;
        Ok(MapData::from_fd(descriptor.try_clone()?)?
            .info()?
            .max_entries())
    }

    /// A hash map.
    pub fn table<K: bytemuck::Pod, V: bytemuck::Pod>(
        &mut self,
        name: &'static str,
    ) -> Result<Table<K, V>> {
        Table::try_from(self.take(name)?).with_context(|| format!("the map {name}"))
    }

    /// A trie of prefixes.
    pub fn trie<V: bytemuck::Pod>(&mut self, name: &'static str) -> Result<Trie<V>> {
        Trie::try_from(self.take(name)?).with_context(|| format!("the map {name}"))
    }

    /// An array.
    pub fn list<V: bytemuck::Pod>(&mut self, name: &'static str) -> Result<List<V>> {
        List::try_from(self.take(name)?).with_context(|| format!("the map {name}"))
    }

    /// A per-CPU array.
    pub fn counters<V: bytemuck::Pod>(&mut self, name: &'static str) -> Result<Counters<V>> {
        Counters::try_from(self.take(name)?).with_context(|| format!("the map {name}"))
    }

    /// An array as memory.
    pub fn memory(&mut self, name: &'static str) -> Result<Memory> {
        let descriptor = self
            .0
            .remove(name)
            .ok_or_else(|| anyhow!("the map {name} is missing"))?;
        Memory::map(descriptor).with_context(|| format!("map the map {name} into memory"))
    }
}

/// An array that both halves see at once. All of it is read and written by words, as the kernel half does.
pub struct Memory {
    map: MmapRaw,
    bytes: usize,
}

impl Memory {
    fn map(descriptor: OwnedFd) -> Result<Self> {
        let fd = descriptor.as_raw_fd();
        let data = MapData::from_fd(descriptor)?;
        let info = data.info()?;
        let bytes = (info.value_size() as usize).next_multiple_of(8) * info.max_entries() as usize;
        let map = MmapOptions::new().len(bytes).map_raw(fd)?;
        // The mapping keeps the map alive; `data` and its descriptor may go.
        Ok(Self { map, bytes })
    }

    /// The 64-bit words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, `bytes` long, and lives as long as `self`; whoever shares it writes
        // whole words.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.bytes / 8) }
    }

    /// The 32-bit slots of rings.
    pub fn slots(&self) -> &[AtomicU32] {
        // SAFETY: as in `words`; slots are read and written whole.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.bytes / 4) }
    }

    /// The 16-bit stamps of slots.
    pub fn stamps(&self) -> &[AtomicU16] {
        // SAFETY: as in `slots`.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.bytes / 2) }
    }

    /// Writes words from the index `at` on; one that holds its value already is left alone.
    pub fn write(&self, at: usize, values: &[u64]) {
        for (word, value) in self.words().iter().skip(at).zip(values) {
            if word.load(Relaxed) != *value {
                word.store(*value, Relaxed);
            }
        }
    }

    /// A copy of `T` from the beginning.
    pub fn read<T: bytemuck::Pod>(&self) -> T {
        let words: Vec<u64> = self
            .words()
            .iter()
            .take(size_of::<T>().div_ceil(8))
            .map(|word| word.load(Relaxed))
            .collect();
        let bytes = bytemuck::cast_slice::<u64, u8>(&words);
        bytemuck::pod_read_unaligned(&bytes[..size_of::<T>()])
    }
}
