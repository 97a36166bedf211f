//! From files to a checked configuration: everything that is wrong is found in one run.

use std::cell::Cell;
use std::path::Path;

use toml::de::DeTable;

use super::check::Whole;
use super::context::{CertificateCheck, Context, read};
use super::names::Names;
use super::problem::{Problems, Source};
use super::settings::{configured, drop_ins};
use super::source::{FILE_BYTES_MAX, Reader, failure};
use super::table::Section;
use super::{Config, Diagnostic, EMBEDDED_FOLDER, Origin, Resolver};
use super::{datapath, listener, log, policy, resolver, route, upstream};
use crate::tunable::Tunables;

/// Most files in `conf.d`, and most objects of one kind over all files.
const FILES_MAX: usize = 1000;
const LISTENERS_MAX: usize = 4096;
const ROUTES_MAX: usize = 65_536;
const POLICIES_MAX: usize = 4096;
const UPSTREAMS_MAX: usize = 4095;

/// A good configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    pub config: Config,
    /// Defaults, drop-in files and `[tunables]`; flags and what was set at run time are the caller's to add.
    pub tunables: Tunables,
    pub warnings: Vec<Diagnostic>,
}

/// Read and check the main file and `conf.d/*.toml` beside it. Pure over the reader: the same answers give the same
/// result. `EMBEDDED` as path loads what is built in.
///
/// # Errors
/// All that is wrong, and the warnings, in the order of files and lines.
pub fn load(reader: &dyn Reader, main: &Path) -> Result<Loaded, Vec<Diagnostic>> {
    load_checked(reader, main, &|_| Ok(()))
}

/// As `load`; each certificate is given to `check_certificate`, whose error is told with the line that names it.
///
/// # Errors
/// As `load`.
pub fn load_checked(
    reader: &dyn Reader,
    main: &Path,
    check_certificate: &CertificateCheck<'_>,
) -> Result<Loaded, Vec<Diagnostic>> {
    let problems = Problems::default();
    let sources = sources(reader, main, &problems);
    let loaded = walk(reader, &sources, &problems, check_certificate);
    let has_errors = problems.has_errors();
    let found = problems.into_sorted();
    match loaded {
        Some((config, tunables)) if !has_errors => Ok(Loaded {
            config,
            tunables,
            warnings: found,
        }),
        _ => Err(found),
    }
}

/// The main file and those of `conf.d`, in order.
fn sources(reader: &dyn Reader, main: &Path, problems: &Problems) -> Vec<Source> {
    let mut paths = vec![main.to_owned()];
    if !main.starts_with(EMBEDDED_FOLDER) {
        let folder = main.parent().unwrap_or(Path::new("")).join("conf.d");
        // No such folder is usual; one that cannot be read would silently leave out half of a configuration.
        match reader.list(&folder) {
            Ok(entries) => {
                let is_toml = |path: &std::path::PathBuf| {
                    path.extension()
                        .is_some_and(|extension| extension == "toml")
                };
                paths.extend(entries.into_iter().filter(is_toml));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => problems.push_general(Diagnostic::error(format!(
                "cannot read {}: {}",
                folder.display(),
                failure(&error)
            ))),
        }
    }
    if paths.len() > FILES_MAX {
        problems.push_general(Diagnostic::error(format!(
            "there are more than {FILES_MAX} files in conf.d"
        )));
        paths.truncate(FILES_MAX);
    }
    let mut sources = Vec::new();
    for (index, path) in paths.iter().enumerate() {
        match read(reader, path) {
            Ok(bytes) if bytes.len() as u64 > FILE_BYTES_MAX => {
                problems.push(
                    (index, 0),
                    Diagnostic::error(format!("{} is larger than 1MiB", path.display())),
                );
            }
            Ok(bytes) => sources.extend(decoded(index, path, bytes, problems)),
            Err(error) => {
                let message = format!("cannot read {}: {}", path.display(), failure(&error));
                problems.push((index, 0), Diagnostic::error(message));
            }
        }
    }
    sources
}

fn decoded(index: usize, path: &Path, bytes: Vec<u8>, problems: &Problems) -> Option<Source> {
    match String::from_utf8(bytes) {
        Ok(text) => Some(Source::new(index, path, text, false)),
        Err(error) => {
            let line = error.as_bytes()[..error.utf8_error().valid_up_to()]
                .iter()
                .filter(|byte| **byte == b'\n')
                .count()
                + 1;
            let message = format!("{}:{line} is no text in UTF-8", path.display());
            problems.push((index, 0), Diagnostic::error(message));
            None
        }
    }
}

/// All sections of one kind, over all files.
struct Sections<'s> {
    datapath: Vec<Section<'s>>,
    log: Vec<Section<'s>>,
    listeners: Vec<Section<'s>>,
    routes: Vec<Section<'s>>,
    policies: Vec<Section<'s>>,
    upstreams: Vec<Section<'s>>,
    resolver: Vec<Section<'s>>,
    tunables: Vec<Section<'s>>,
}

fn walk(
    reader: &dyn Reader,
    sources: &[Source],
    problems: &Problems,
    check_certificate: &CertificateCheck<'_>,
) -> Option<(Config, Tunables)> {
    let documents: Vec<_> = sources
        .iter()
        .map(|source| (source, parse(source, problems)))
        .collect();
    let documents: Vec<_> = documents
        .iter()
        .filter_map(|(source, document)| Some((*source, document.as_ref()?)))
        .collect();
    if problems.has_errors() {
        // What stands in a file that cannot be read is not known: to go on would call all of it missing.
        return None;
    }
    let sections = collect(&documents, problems);
    let context = Context {
        reader,
        problems,
        check_certificate,
        files: Cell::new(sources.len()),
        listeners: Names::collect("listener", &sections.listeners),
        policies: Names::collect("policy", &sections.policies),
        upstreams: Names::collect("upstream", &sections.upstreams),
    };
    let (whole, written) = read_all(&sections, &context);
    whole.check(problems);
    if problems.has_errors() {
        return None;
    }
    finished(whole, written)
}

/// The document of a file; `None` after complaints.
fn parse<'s>(source: &'s Source, problems: &Problems) -> Option<DeTable<'s>> {
    let (document, errors) = DeTable::parse_recoverable(&source.text);
    for error in &errors {
        let spot = source.spot(problems, error.span().unwrap_or(0..0));
        let message = format!("no TOML: {}", error.message());
        if spot.may_hold_secret() {
            spot.refuse_unseen::<()>(message);
        } else {
            spot.refuse::<()>(message, "", None);
        }
    }
    if !errors.is_empty() {
        return None;
    }
    let document = document.into_inner();
    source.hide_secrets(&document);
    Some(document)
}

fn collect<'s>(
    documents: &[(&'s Source, &'s DeTable<'s>)],
    problems: &'s Problems,
) -> Sections<'s> {
    let mut sections = Sections {
        datapath: Vec::new(),
        log: Vec::new(),
        listeners: Vec::new(),
        routes: Vec::new(),
        policies: Vec::new(),
        upstreams: Vec::new(),
        resolver: Vec::new(),
        tunables: Vec::new(),
    };
    for (source, document) in documents {
        let root = Section::new(
            source.spot(problems, 0..0),
            "the configuration".to_owned(),
            document,
        );
        let one = |key| root.find(key).and_then(|value| value.section());
        sections.datapath.extend(one("datapath"));
        sections.log.extend(one("log"));
        sections.resolver.extend(one("resolver"));
        sections.tunables.extend(one("tunables"));
        let many = |key, max, into: &mut Vec<Section<'s>>| {
            for section in root
                .find(key)
                .map(|value| value.tables())
                .unwrap_or_default()
            {
                if into.len() == max {
                    section.spot.refuse::<()>(
                        format!("there are more than {max} of {}", section.name),
                        "",
                        None,
                    );
                    break;
                }
                into.push(section);
            }
        };
        many("listener", LISTENERS_MAX, &mut sections.listeners);
        many("route", ROUTES_MAX, &mut sections.routes);
        many("policy", POLICIES_MAX, &mut sections.policies);
        many("upstream", UPSTREAMS_MAX, &mut sections.upstreams);
        root.finish();
    }
    for (name, found) in [
        ("datapath", &sections.datapath),
        ("log", &sections.log),
        ("resolver", &sections.resolver),
    ] {
        if let [first, second, ..] = found.as_slice() {
            let message = format!("[{name}] stands in two files");
            second
                .spot
                .refuse_with::<()>(message, "again", first.spot, "first");
        }
    }
    sections
}

/// `[tunables]` as written.
type Written = Vec<(String, String, Origin)>;

fn read_all<'s>(sections: &Sections<'s>, context: &Context<'s>) -> (Whole<'s>, Written) {
    let mut tunables = Tunables::default();
    drop_ins(context, &mut tunables);
    let written = configured(&sections.tunables, &mut tunables);
    let placed = |section: &Section<'s>| section.spot;
    let datapath = sections.datapath.first().map_or_else(
        || Some(datapath::absent()),
        |section| datapath::datapath(section, context),
    );
    let access_log = sections
        .log
        .first()
        .map(|section| log::access_log(section, context));
    let resolver = sections
        .resolver
        .first()
        .map_or_else(|| Some(Resolver::default()), resolver::resolver);
    let l7_values = sections.upstreams.iter().map(upstream::l7_values).collect();
    let upstreams = sections
        .upstreams
        .iter()
        .map(|section| Some((upstream::upstream(section, context)?, placed(section))))
        .collect();
    let policies = sections
        .policies
        .iter()
        .map(|section| Some((policy::policy(section, context)?, placed(section))))
        .collect();
    let listeners: Vec<_> = sections
        .listeners
        .iter()
        .map(|section| listener::listener(section, context))
        .collect();
    let routes = sections.routes.iter().zip(1..);
    let routes = routes
        .map(|(section, number)| route::route(section, number, context, &listeners))
        .collect();
    (
        Whole {
            datapath,
            access_log,
            listeners,
            routes,
            policies,
            upstreams,
            resolver,
            l7_values,
            tunables,
        },
        written,
    )
}

/// The configuration of a whole without errors; every part is there then.
fn finished(whole: Whole<'_>, tunables: Written) -> Option<(Config, Tunables)> {
    let config = Config {
        datapath: whole.datapath?.datapath,
        access_log: match whole.access_log {
            Some(access_log) => Some(access_log?),
            None => None,
        },
        listeners: whole
            .listeners
            .into_iter()
            .map(|draft| Some(draft?.listener))
            .collect::<Option<_>>()?,
        routes: whole
            .routes
            .into_iter()
            .map(|draft| Some(draft?.route))
            .collect::<Option<_>>()?,
        policies: whole
            .policies
            .into_iter()
            .map(|policy| Some(policy?.0))
            .collect::<Option<_>>()?,
        upstreams: whole
            .upstreams
            .into_iter()
            .map(|upstream| Some(upstream?.0))
            .collect::<Option<_>>()?,
        resolver: whole.resolver?,
        tunables,
    };
    Some((config, whole.tunables))
}
