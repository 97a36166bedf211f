//! The rounds of a scenario: interleaved over the peers in rotated order, judged one by one, repeated where strangers disturbed.

use std::cell::OnceCell;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rig::certificate::Authority;
use rig::field::Field;
use rig::namespace::Namespace;
use rig::sandbox;
use rustls::ClientConfig;

use crate::load::{self, Plan};
use crate::machine::Cores;
use crate::peer::{self, Layer, Peer};
use crate::round::{Discard, Figures, Round};
use crate::sample;
use crate::say;
use crate::scenario::{Case, Work};

/// Before a round counts: connections are made, caches are warm, pools are full.
const WARM_UP: Duration = Duration::from_millis(500);
/// So often a round is tried until it counts, on average.
pub const ATTEMPTS: usize = 4;
/// How long a round waits for others to finish what they are doing; then it begins anyway, and is judged.
const CALM_MAX: Duration = Duration::from_secs(20);
/// How a campaign is led.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Rounds that must count, for each peer and case.
    pub rounds: usize,
    pub window: Duration,
    /// Rounds that strangers disturbed count too.
    pub noisy: bool,
}

/// Where it takes place.
pub struct Stage {
    namespace: Namespace,
    /// Client, edge and origins joined by veth pairs: made when packets are first measured.
    field: OnceCell<Field>,
    pub cores: Cores,
    /// That each proxy may have.
    pub descriptors: u64,
    authority: Authority,
}

/// A peer, and why it cannot be measured if it cannot.
#[derive(Clone)]
pub struct Candidate {
    pub peer: Peer,
    pub missing: Option<String>,
}

/// All rounds of one peer in one case.
pub struct Course {
    pub peer: Peer,
    pub rounds: Vec<Figures>,
    /// Why rounds did not count.
    pub discarded: Vec<Discard>,
    /// Why there is nothing to count: missing, did not start, answered wrongly.
    pub failure: Option<String>,
}

impl Stage {
    /// A network of our own, in which no port is taken and none runs out.
    pub fn set(cores: Cores, descriptors: u64) -> Result<Self> {
        let namespace = Namespace::create("bench")?;
        namespace.set("ipv4/ip_local_port_range", "10000 65535")?;
        namespace.set("core/somaxconn", "8192")?;
        // Clients of `http1-connect` use a port again a second after its connection has ended.
        namespace.set("ipv4/tcp_tw_reuse", "1")?;
        Ok(Self {
            namespace,
            field: OnceCell::new(),
            cores,
            descriptors,
            authority: certify()?,
        })
    }

    /// Client, edge and origins, joined by veth pairs.
    pub fn field(&self) -> Result<&Field> {
        if let Some(field) = self.field.get() {
            return Ok(field);
        }
        let field = Field::build()?;
        // Who is no proxy needs Linux to route.
        field.edge.set("ipv4/ip_forward", "1")?;
        // New connections come faster than old ones leave TIME_WAIT.
        field
            .client
            .set("ipv4/ip_local_port_range", "10000 65535")?;
        for namespace in [&field.client, &field.edge] {
            namespace.set("ipv4/tcp_tw_reuse", "1")?;
        }
        for namespace in [&field.edge, &field.origins[0]] {
            namespace.set("core/somaxconn", "8192")?;
        }
        Ok(self.field.get_or_init(|| field))
    }

    /// Where proxies of a layer run.
    pub fn namespace(&self, layer: Layer) -> Result<&Namespace> {
        Ok(match layer {
            Layer::Requests => &self.namespace,
            Layer::Packets => &self.field()?.edge,
        })
    }

    /// Where clients of a layer are.
    pub fn clients(&self, layer: Layer) -> Result<&Namespace> {
        Ok(match layer {
            Layer::Requests => &self.namespace,
            Layer::Packets => &self.field()?.client,
        })
    }

    /// All rounds of one case. Peers with a reason to be missing are not measured.
    pub fn play(
        &self,
        case: &Case,
        candidates: &[Candidate],
        settings: Settings,
    ) -> Result<Vec<Course>> {
        let mut courses: Vec<Course> = candidates
            .iter()
            .map(|candidate| Course {
                peer: candidate.peer,
                rounds: Vec::new(),
                discarded: Vec::new(),
                failure: candidate.why_not(case),
            })
            .collect();
        for attempt in 0..ATTEMPTS * settings.rounds {
            for number in 0..courses.len() {
                let at = (number + attempt) % courses.len();
                let course = &mut courses[at];
                if course.wants_more(settings) {
                    course.attempt(self, case, settings);
                }
            }
        }
        Ok(courses)
    }

    fn round(&self, peer: &Peer, case: &Case, settings: Settings) -> Result<Round> {
        let folder = sandbox::folder("bench")?;
        let proxy = peer.start(self, &folder, case.site)?;
        let site = case.site;
        let origin_namespace = match site.layer {
            Layer::Requests => None,
            Layer::Packets => self.field()?.origins.first().cloned(),
        };
        let tls = site.tls.then(|| self.trusting(case.resumes)).transpose()?;
        let plan = Plan {
            proxy: if peer.is_floor() {
                site.origin()
            } else {
                site.listen()
            },
            origin: site.origin(),
            origin_namespace,
            proxy_pid: proxy.pid(),
            cores: self.cores,
            tls,
            exchange: case.exchange.clone(),
            connections: self.connections(case),
            reuse: case.reuse,
            resumes: case.resumes,
        };
        let case = case.clone();
        let load = self
            .clients(site.layer)?
            .thread("load", move || play(plan, &case, settings))?;
        let round = load.join().map_err(|_| anyhow!("the load panicked"))?;
        round.with_context(|| match proxy.last_words() {
            words if words.is_empty() => "it printed nothing".to_owned(),
            words => format!("it printed:\n{words}"),
        })
    }

    fn trusting(&self, resumes: bool) -> Result<Arc<ClientConfig>> {
        load::trusting(&self.authority.certificate(), resumes)
    }

    /// As many as the case asks for and our descriptors allow.
    fn connections(&self, case: &Case) -> usize {
        let most = peer::connections_max(self.descriptors);
        case.connections
            .min(usize::try_from(most).unwrap_or(usize::MAX))
    }
}

/// What the load's thread does.
fn play(plan: Plan, case: &Case, settings: Settings) -> Result<Round> {
    let outcome = match case.work {
        Work::Exchanges(pace) => load::exchange(plan, pace, WARM_UP, settings.window)?,
        Work::Transfer(direction) => load::transfer(plan, direction)?,
        Work::Datagrams => load::datagrams(&plan, WARM_UP, settings.window)?,
        Work::Idle => return load::hold(plan).map(|held| Round::of_idle(&held)),
    };
    Ok(Round::of_work(&outcome, case, settings.noisy))
}

/// Makes the certificate of the proxies, in one file with its key as all of them take it.
fn certify() -> Result<Authority> {
    let authority = Authority::create(&sandbox::folder("authority")?)?;
    let (signed, folder) = (sandbox::folder("signed")?, sandbox::folder("bench/certs")?);
    authority.sign(&signed, "edge", &[load::SERVER_NAME])?;
    let both = [
        fs::read(signed.join("edge.pem"))?,
        fs::read(signed.join("edge.key"))?,
    ];
    fs::write(folder.join("edge.pem"), both.concat()).context("write the certificate")?;
    Ok(authority)
}

impl Candidate {
    /// Why it cannot be measured in a case.
    fn why_not(&self, case: &Case) -> Option<String> {
        let missing = self.missing.as_ref();
        let lacks = self.peer.lacks(case.needs());
        missing
            .map(|why| format!("missing: {why}"))
            .or(lacks.map(|why| format!("not measured: {why}")))
    }
}

impl Course {
    fn wants_more(&self, settings: Settings) -> bool {
        // What the load or the proxy itself cannot do, it will not do at the tenth time either.
        let lasting = self.discarded.iter().filter(|why| !why.is_passing());
        let hopeless = self.rounds.is_empty() && lasting.count() >= settings.rounds;
        self.failure.is_none() && self.rounds.len() < settings.rounds && !hopeless
    }

    fn attempt(&mut self, stage: &Stage, case: &Case, settings: Settings) {
        let start = Instant::now();
        let calm = if settings.noisy {
            Ok(())
        } else {
            sample::wait_for_calm(stage.cores, CALM_MAX)
        };
        let round = match calm.and_then(|()| stage.round(&self.peer, case, settings)) {
            Ok(round) => round,
            Err(error) => {
                say::failed(&format!("{} in {}: {error:#}", self.peer.name, case.name));
                self.failure = Some(format!("failed: {error:#}"));
                return;
            }
        };
        say::round(self.peer.name, &case.name, &round, start);
        match round.discard {
            None => self.rounds.push(round.figures),
            Some(why) => self.discarded.push(why),
        }
    }
}
